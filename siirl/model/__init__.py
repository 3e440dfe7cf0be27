"""The decoder that training and the built-in rollout engine share, and how weights come in and go out."""
