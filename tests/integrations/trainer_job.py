"""A training with a Trainer on CPU ranks, as a script: FOLDER STEPS [OPTION...]

Trains to STEPS of 12 steps, resuming if there is a checkpoint, and prints a digest of the weights.
"""

import hashlib
import json
import os
import sys
import warnings

warnings.simplefilter("ignore")
import torch  # noqa: E402
import transformers  # noqa: E402

from shardckpt.integrations.transformers_trainer import Trainer  # noqa: E402

FOLDER, STEPS, *OPTIONS = sys.argv[1:]
WORLD = int(os.environ.get("WORLD_SIZE", "1"))
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
)


class StopAt(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= int(STEPS)
        return control


trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[StopAt()])
trainer.train(resume_from_checkpoint=True)
if "save-model" in OPTIONS:
    trainer.save_model()
if trainer.is_world_process_zero():
    weights = torch.cat([value.flatten() for value in model.state_dict().values()])
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()
    steps = [entry["step"] for entry in trainer.state.log_history]
    print(json.dumps({"digest": digest, "sum": weights.double().sum().item(), "steps": steps}))
