"""An OpenAI-compatible server: the engine in a thread of its own, HTTP in an event loop, queues between the two."""
