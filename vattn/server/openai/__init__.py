"""The OpenAI API: its messages, and what becomes of them."""
