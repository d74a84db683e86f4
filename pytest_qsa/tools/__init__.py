"""What `qsa` does beside gating, a room a tool."""
