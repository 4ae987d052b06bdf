"""A tiny language model, generated on the spot: real shapes, random weights, no download.

Two layers, hidden size 128, a byte-level BPE tokenizer with a chat template, context 16,384. Its answers are
noise, but serving them exercises the real engine.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

CONTEXT_TOKENS = 16_384
VOCABULARY = 512
LINES = (
    "The log is the only truth; everything else is a fold over it.",
    "A client only ever receives tokens that are already durable.",
    "Prompt tokens, output tokens, seconds: the bill is a pure function of the log.",
    "one two three four five six seven eight nine ten",
    "¿Dónde está el río? 水は流れる。 🌊🙂",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(path: Path, *, marks: Sequence[str] = ()) -> Path:
    """Write config, tokenizer and weights under `path`; the same bytes on every call.

    Each of `marks` becomes one token.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    tokenizer.add_tokens([*marks])
    tokenizer.save_pretrained(path)
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def _tokenizer():  # type: ignore[no-untyped-def]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
