"""Times of calls: `workloads` and `cases` say what, `timing` how; `run` measures, `table` shows."""
