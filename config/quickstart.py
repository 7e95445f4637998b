"""A small model on the synthetic corpus: from nothing to a story in a minute or two on two CPU cores.

python prepare.py nursery --tokenizer bpe:2048 && python train.py config/quickstart.py

Nine of ten stories keep their hero (docs/judging.md). --architecture=gpt2 trains a model that can be exported to
transformers and llama.cpp, too, but its heroes change their names.
"""

dataset = "nursery-bpe2048"  # nearly every word of the corpus is one token

architecture = "modern"  # learns in this time to copy a name from the beginning of the story
n_layer = 3
n_head = 2
n_embd = 128
block_size = 256  # most stories fit completely
bias = False
dropout = 0.0  # a part of an epoch cannot overfit
init_embeddings = "cooccurrence"

batch_size = 8  # 2,048 tokens per step
gradient_accumulation_steps = 1
max_iters = 1_300

optimizer = "muon"
muon_lr = 0.02
learning_rate = 1.2e-2  # AdamW's, for the embeddings
beta2 = 0.999  # the large gradients of a rare token are many steps apart
lr_schedule = "linear"
min_lr = 0.0
warmup_iters = 10
weight_decay = 0.0
grad_clip = 1.0

eval_interval = 325
eval_iters = 20
log_interval = 25
