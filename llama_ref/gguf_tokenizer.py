"""The face of `tokenizers.gguf_tokenizer`: how a GGUF file's vocabulary is cut and normalised, for those who ask."""

from llama_ref.tokenizers.gguf_tokenizer import settings_of

__all__ = ["settings_of"]
