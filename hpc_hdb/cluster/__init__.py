"""Who talks to whom, and how. Knows nothing of training."""
