"""Workers: each is one process on one device that runs its own plan; and how they are launched."""
