"""What happens to the two phases before they run: one file a kind."""
