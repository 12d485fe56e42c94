"""Two processes: a model split by its tensor-parallel plan, and one sharded by FSDP2, equal the whole one.

Run by pytest, the file starts itself under torchrun; run as a script, it is what each process does.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from llama_pair import build_pair
from torch.distributed.fsdp import fully_shard

from hf_models import LlamaStyleForCausalLM


def test_split_and_sharded_models_equal_the_whole_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = subprocess.run([*command, __file__], capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]


def check_tensor_parallel(input_ids: torch.Tensor, folder: str) -> None:
    for tied in (False, True):
        torch.manual_seed(0)
        whole, _ = build_pair(tie_word_embeddings=tied)
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        split = LlamaStyleForCausalLM.from_pretrained(folder, tp_plan="auto")
        dist.barrier()
        layer = split.model.layers[0]
        assert layer.self_attn.q_proj.weight.to_local().shape[0] == whole.config.hidden_size // 2
        torch.testing.assert_close(split(input_ids).logits, whole(input_ids).logits)
        losses = [model.train()(input_ids, labels=input_ids).loss for model in (split, whole)]
        torch.testing.assert_close(*losses)
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(
            layer.mlp.up_proj.weight.grad.full_tensor(), whole.model.layers[0].mlp.up_proj.weight.grad
        )


def check_fully_sharded(input_ids: torch.Tensor) -> None:
    losses = {"whole": [], "head in the root": [], "head in a group of its own": []}
    for kind in losses:
        torch.manual_seed(0)
        model, _ = build_pair()
        model.train()
        rows = input_ids
        if kind != "whole":
            for layer in model.model.layers:
                fully_shard(layer)
            if "own" in kind:  # as Accelerate does
                fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False)
            fully_shard(model)
            rows = input_ids[dist.get_rank()][None]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            output = model(rows, labels=rows)
            assert output.logits is None  # the loss stays in chunks
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss = output.loss.detach()
            if kind != "whole":
                dist.all_reduce(loss)
                loss /= 2
            losses[kind].append(loss)
    for kind in losses:
        torch.testing.assert_close(losses[kind], losses["whole"])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    ids = torch.randint(1, 96, (2, 12))
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        check_tensor_parallel(ids, str(Path(shared[0])))
    check_fully_sharded(ids)
    dist.destroy_process_group()
