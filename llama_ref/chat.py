"""The face of conversations: messages to text and ids, by the checkpoint's own template."""

from llama_ref.tokenizers.chat import Message, chat_ids, chat_text

__all__ = ["Message", "chat_ids", "chat_text"]
