"""What the daemon does for one instance, an ability a file: each reports events and knows nothing of the state."""
