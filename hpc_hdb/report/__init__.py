"""What a user reads of a run: events, progress, summary, plots, the report."""
