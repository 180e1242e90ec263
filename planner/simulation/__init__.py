"""The simulator: the same planner, policy and cost model as the daemon, on a simulated clock."""
