"""TinyStories without a GPU: the speedrun's recipe for a larger model and one epoch of a fiftieth of TinyStories.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py

Another length (--max_tokens=4_000_000, --max_minutes=5): the learning-rate schedule follows it. The fewer the tokens,
the smaller the best model: config/speedrun.py has the record for 3.65 M tokens. --architecture=gpt2 trains a model that
can be exported to Hugging Face and llama.cpp.
"""

dataset = "tinystories-bpe4096"  # with GPT-2's 50,257 tokens most of the arithmetic would be in the output head

architecture = "modern"
n_layer = 6
n_head = 3
n_embd = 192
block_size = 128
bias = False
dropout = 0.0  # an epoch cannot overfit

batch_size = 16  # 2,048 tokens per step
gradient_accumulation_steps = 1
max_tokens = 8_100_000

optimizer = "muon"
muon_lr = 0.02
learning_rate = 6e-3  # AdamW's, for the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart (docs/recipes.md)
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 500
eval_iters = 20
