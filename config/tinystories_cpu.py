"""Real TinyStories on a machine without a GPU: the published body with a small vocabulary and a sane schedule.

python prepare.py --tokenizer bpe:4096 && python train.py config/tinystories_cpu.py
"""

dataset = "tinystories-bpe4096"  # GPT-2's 50,257 tokens would take two thirds of the arithmetic, for the head alone

n_layer = 6
n_head = 6
n_embd = 384
block_size = 128
dropout = 0.0  # a fraction of one epoch cannot be learnt by heart

# Small batches: many updates matter more than smooth gradients while the loss still falls fast.
batch_size = 16  # 2,048 tokens an update
gradient_accumulation_steps = 1
max_iters = 2_000  # 4.1 M tokens

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
grad_clip = 1.0

eval_interval = 250
eval_iters = 20
