"""Block streaming, activation offload, and the planner that chooses among them."""
