"""Whatever can be judged, as a Subject. Only this floor imports the two Llamas."""
