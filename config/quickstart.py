"""A small model on the synthetic corpus: from nothing to a story in a minute or two on two CPU cores.

python prepare.py nursery --tokenizer bpe:2048 && python train.py config/quickstart.py
"""

dataset = "nursery-bpe2048"  # nearly every word of the corpus is one token

n_layer = 2  # a wide, shallow model learns faster here than a narrow, deep one
n_head = 4
n_embd = 256
block_size = 256  # most stories fit completely
dropout = 0.0  # a third of an epoch cannot overfit

# Many small steps: in two minutes, a batch of 8 reaches a higher loss than one of 4.
batch_size = 4
gradient_accumulation_steps = 1
max_iters = 1_300

learning_rate = 3e-3
min_lr = 0.0
warmup_iters = 50
beta2 = 0.99  # small batches have noisy gradients: average their squares over more steps
grad_clip = 1.0

eval_interval = 325
eval_iters = 20
log_interval = 25
