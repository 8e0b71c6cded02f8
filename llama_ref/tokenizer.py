"""The face of `tokenizers`: what a caller of the reference needs to turn text into ids and back."""

from llama_ref.tokenizers.contract import Tokenizer
from llama_ref.tokenizers.json_tokenizer import JsonTokenizer
from llama_ref.tokenizers.tokenizer import RandomTokenizer, has_tokenizer, load_tokenizer
from llama_ref.tokenizers.tokenizer_files import TokenizerError

__all__ = ["JsonTokenizer", "RandomTokenizer", "Tokenizer", "TokenizerError", "has_tokenizer", "load_tokenizer"]
