"""Looking at models: what their tokens attend to, and what they cost."""
