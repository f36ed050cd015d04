"""Search spaces: what MetaSchedule may decide about each kernel."""
