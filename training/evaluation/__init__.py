"""What a policy is worth: rollouts, held-out windows, intervals, comparisons, and the report."""
