"""What ``flexctl simulate`` needs besides the planner: files, and a report."""
