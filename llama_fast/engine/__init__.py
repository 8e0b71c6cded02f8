"""From prompts to tokens: requests, sampling, and the loop that decodes."""
