"""`transllm serve`: a model behind OpenAI's protocol, and a page to talk to it."""
