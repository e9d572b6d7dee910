"""One run, from settings to summary: puts plan, cluster, train and report together."""
