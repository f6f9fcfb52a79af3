"""A training with a Trainer on CPU ranks, as a script: FOLDER STEPS [OPTION...]

Trains to STEPS of 12 steps, resuming if there is a checkpoint, and prints a digest of the weights.
Options: `fsdp2`, `lora`, `only-model`, `save-model`, `push`, and `best-N`, which evaluates when it
saves, finds step N best, and loads its weights in the end.
"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402

from shardckpt.integrations.transformers_trainer import Trainer  # noqa: E402
from tests.integrations.jobs import allow_fsdp_on_cpu  # noqa: E402

FOLDER, STEPS, *OPTIONS = sys.argv[1:]
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
BEST = next((int(option[5:]) for option in OPTIONS if option.startswith("best-")), None)
config = transformers.LlamaConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    vocab_size=32,
    intermediate_size=24,
    attention_dropout=0.0,
)
torch.manual_seed(0)
model = transformers.AutoModelForCausalLM.from_config(config)
if "lora" in OPTIONS:
    import peft

    torch.manual_seed(1)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
data = [{"input_ids": (ids := torch.randint(0, 32, (8,))), "labels": ids} for _ in range(64)]
options = {}
if "fsdp2" in OPTIONS and WORLD > 1:
    allow_fsdp_on_cpu()
    layers = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options |= {"fsdp": True, "fsdp_config": layers}
if BEST is not None:
    options |= {
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
args = transformers.TrainingArguments(
    FOLDER,
    use_cpu=True,
    max_steps=12,
    per_device_train_batch_size=8 // WORLD,
    save_steps=4,
    save_total_limit=2,
    learning_rate=0.01,
    logging_steps=4,
    report_to=[],
    disable_tqdm=True,
    seed=3,
    dataloader_pin_memory=False,
    save_only_model="only-model" in OPTIONS,
    lr_scheduler_type="cosine",
    warmup_steps=2,
    restore_callback_states_from_checkpoint=True,
    **options,
)


class StopAt(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= int(STEPS)
        return control


class Counter(transformers.TrainerCallback, ExportableState):
    """Counts the steps, as a callback whose state is saved."""

    def __init__(self, count=0):
        self.count = count

    def on_step_end(self, args, state, control, **_):
        self.count += 1

    def state(self):
        return {"args": {"count": self.count}, "attributes": {}}


class Evaluated(Trainer):
    def evaluate(self, *arguments, **named):
        return {"eval_score": float(self.state.global_step == BEST)}


trainer = Evaluated(
    model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=[StopAt(), Counter()]
)
trainer.train(resume_from_checkpoint=True)
if "save-model" in OPTIONS:
    trainer.save_model()
if "push" in OPTIONS:
    trainer.save_model(_internal_call=True)  # as push_to_hub does
weights = torch.cat(
    [
        (value.full_tensor() if hasattr(value, "full_tensor") else value).flatten()
        for value in trainer.model.state_dict().values()
    ]
)
if trainer.is_world_process_zero():
    counters = [one for one in trainer.callback_handler.callbacks if type(one) is Counter]
    found = {
        "digest": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
        "sum": weights.double().sum().item(),
        "steps": [entry["step"] for entry in trainer.state.log_history if "loss" in entry],
        "counts": [one.count for one in counters],
        "sharded": any(hasattr(value, "full_tensor") for value in trainer.model.parameters()),
    }
    print(json.dumps(found))
