"""MLflow as the jobs use it: one run per training, points that outlive a server's absence."""
