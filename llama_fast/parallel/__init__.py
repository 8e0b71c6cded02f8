"""Which part of the model a process holds, and how processes sum: one file a kind."""
