"""The search: workloads, valid inputs, MetaSchedule's parts, progress and the database."""
