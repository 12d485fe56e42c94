"""A model of 100,000 parameters that has learnt three answers by heart, and when to stop."""

import torch

from hf_models import LlamaStyleConfig, LlamaStyleForCausalLM
from hf_models.bpe_tokenizer import train_bpe

ANSWERS = {
    "What is a river?": "A river is water that flows to the sea.",
    "Where does it begin?": "At a spring, high in the mountains.",
    "And a lake?": "A lake is water that stays.",
}
CONTEXT = 256


def tiny_tokenizer(style="byte_level"):
    texts = [text for exchange in ANSWERS.items() for text in exchange]
    return train_bpe(texts * 4, 300 if style == "byte_level" else 320, style)


def new_tiny_model(tokenizer):
    torch.manual_seed(0)
    config = LlamaStyleConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    return LlamaStyleForCausalLM(config).eval()


def save_tiny_chat_model(folder):
    """Trains it and saves it with its tokenizer: a folder as a run of `training.sft` leaves it, but for its record."""
    tokenizer = tiny_tokenizer()
    model = new_tiny_model(tokenizer).train()
    chats = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in ANSWERS.items()
    ]
    chats += [chats[0] + chats[1], chats[2] + chats[0]]
    batch = tokenizer.apply_chat_template(chats, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.eot_token_id]
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
