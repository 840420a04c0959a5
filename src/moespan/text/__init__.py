"""Text to token ids and back, and messages to text: the tokenizer and the chat template."""
