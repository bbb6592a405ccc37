"""What the commands do that are neither training nor deployment: data, info, and checks before anything starts."""
