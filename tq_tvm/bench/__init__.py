"""Times of the calls: `timing` says how, `cases` what, `run` measures, `table` shows."""
