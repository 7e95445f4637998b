"""TinyStories on two CPU cores in ten minutes (docs/speedrun.md).

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py

Another length (--max_tokens=20_000_000, --max_minutes=20): the learning-rate schedule follows it. The longer the run,
the larger the best model: --n_layer=4 --max_minutes=4.75 for five minutes, config/tinystories_cpu_1h.py for an hour. A
text of less than 400 KB needs shorter blocks: --block_size=256 --batch_size=8. With these, --architecture=gpt2 trains a
model that can be exported to transformers and llama.cpp.
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens most of the arithmetic would be in the output head

architecture = "modern"
n_layer = 6
n_head = 2
n_embd = 128
block_size = 1024  # few stories are cut by its start; attention reaches back 128 tokens (modern.py)
bias = False
dropout = 0.0  # about an epoch of a fiftieth of TinyStories cannot overfit
init_embeddings = "cooccurrence"

batch_size = 2  # 2,048 tokens per step
gradient_accumulation_steps = 1
max_minutes = 9.75

optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3  # AdamW's, for the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart (docs/recipes.md)
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 1000
eval_iters = 20
