"""Distributed pre-training of CR-Net (arXiv 2509.18993) on Megatron-Core and DeepSpeed.

The modules in the order in which to read them; each uses only those above it.

    errors               the exceptions a user can meet
    folder_lock          one writer for each folder
    atomic               files whole or not at all
    field_types          types of configuration fields, each with its range
    ranks, rules         which map has which rank; what must hold between fields
    deepspeed_keys       which keys of DeepSpeed are allowed, with their types; deepspeed_rules: in which layout
    recompute_rules      the same for recomputation
    config               every field of a run
    yaml_files           YAML and JSON, read strictly
    settings             YAML and command line -> Config, and back; versions: what --version prints
    reference            CR-Net in plain PyTorch: the mathematics, alone

    interruption         signals that ask to stop
    noise                messages of libraries that are kept from the terminal
    duration             how long something takes, for people; tables: aligned, and Markdown as well
    cpu_platform         Megatron-Core and DeepSpeed without CUDA: the only patches
    launcher             which rank srun, mpirun, torchrun and their like meant this process to be
    liveness, agreement  who is missing; all ranks mean the same run
    rendezvous           how the processes of a run find each other
    parallel, batch      process groups; how a global batch is cut; batch_sizes: and how it grows
    deepspeed_settings   DeepSpeed's JSON of a run
    arithmetic           parameters and useful operations of a model
    options              what the tools take beside the configuration

    transformer_config   Config -> Megatron-Core's TransformerConfig
    cross_layer_kernels  the residual on CUDA, one pass over memory an operation: Triton
    cross_layer          Y = s(beta) Y_prev + Z, its gradients and its inverse, or the kernels for them
    random_states        random generators, captured and replayed
    fragment, memory     graphs and tensors that a layer remembers for recomputation
    sequence_shards      whole sequences to shards and back
    input_product        z = X A of a group, with its communication
    low_rank_products    Y from z for all positions of a group, with its communication
    linear               the linear maps of a layer, in four groups
    documents            where documents of packed samples begin, for datasets, attention and positions
    norm, attention      RMSNorm; core attention
    layer                one layer
    recompute_plan       where a stage is cut into segments
    activation_store     where kept tensors live: DeepSpeed's activation_checkpointing section
    segment              activation recomputation of a run of layers
    block, gpt           a pipeline stage, the model
    anchors              how far down outputs may be divided, agreed over ranks
    weights              names, initial values and shards of the canonical weights

    tokenizer, tokenizer_training          SentencePiece and Hugging Face tokenizers
    fingerprint          what a run was trained on: tokenizer and data, beside the data and in checkpoints
    decompression, parquet                 gzip, zstd, bzip2, xz; text columns of Parquet
    corpus_files, corpus_stats             which files are read, and how; what was left out, file by file
    corpus, standard_library               documents from files; the corpus that Python ships
    preprocess, worker_pool                documents -> .bin/.idx
    data, data_checks, padded_dataset      .bin/.idx -> samples; index_cache: their indices, stored without pickle
    data_loading, unigram                  samples -> micro-batches; entropy of the tokens
    shared_reads         data files at start: each read once per node
    progress                               how far a tool is

    optimizer            AdamW's groups, the learning rate over time
    schedule             one step under Megatron-Core's schedules
    engine               one step under DeepSpeed: accumulate, reduce, clip, update
    masters              fp32 weights and moments, wherever DeepSpeed keeps them
    state_files          they as files that any layout reads
    training_state       the counters of a run
    bad_steps            which steps would do harm, and how many may be skipped
    replicas             whether ranks with copies of the same weights hold the same bits
    checkpoint_folder    which checkpoints exist, are whole, and stay
    checkpoint_contents  what one must hold to be continued
    checkpoint           a run's whole state, saved in the background
    weight_files         canonical weights in a checkpoint or an export, checked, without process groups
    configuration_crnet, modeling_crnet, tokenization_crnet    travel with an export: transformers alone
    export_config, export_tokenizer        config.json; tokenizer files
    export               checkpoint -> Hugging Face, and back
    inference            opens either in one process, continues prompts; evaluation: loss over text
    communication        counts what a run sends; communication_report: for a configuration
    live_memory          counts the bytes that are alive; recompute_report: for each recomputation strategy
    figures              what a step holds, sends and computes on a rank, however it was found
    local_model          which layers and parameters a rank holds
    estimate_memory, estimate_operations, estimate_traffic   the figures from formulas
    estimate_zero3       which weights ZeRO-3 gathers and holds, by DeepSpeed's own rule
    machines             GPUs and links by data sheet; estimate_time: a step's roofline
    estimate             all of these together; estimate_report: as tables; report: what --dry-run prints
    counted_step         the same figures, counted in a real step
    simulation           that step as one rank of a large world, in one process
    plan_search          the fastest layout that fits, by the estimate
    provenance           the command, machine and versions beside every figure; record_file: the JSON that holds them
    step_identity        which step figures are of, so that they can be set beside each other
    metrics, plot        what a run reports
    sampling             a look at what the model writes
    resumption           what a resumed run does not share with the run that it continues
    run_folder           what a run may write, and what it must not start over
    starting_point       another run's weights to start from: checkpoint.load
    inputs               everything that a run reads, examined before it writes
    determinism          the same bits in each run on CUDA
    residual_in_use      who computes the residual, and who did before the checkpoint
    trainer              the loop

    benchmark_rows       what is compared; benchmark_world: the processes of one row
    benchmark            rows in turn, medians and ratios
    report_inputs        reads runs and figures, whole or damaged
    report_pictures      matplotlib's SVG for paper, phones and the dark; report_page: sections as HTML and Markdown
    report_steps         one step, estimated, simulated and measured
    scaling_report       what a report says
"""

from megatron_crnet.utils.noise import silence_libraries

__version__ = "0.1.0"

silence_libraries()
