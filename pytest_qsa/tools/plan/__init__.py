"""What a run would take, before anything of it is loaded: configuration and headers → memory, time, what would fit."""
