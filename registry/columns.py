"""The columns of every table, in the order in which the check of a row takes them.

`registry.schema` says more of each, but takes longer to import than thousands of rows to check.
"""

from __future__ import annotations

# Table -> its columns, without that of the check.
COLUMNS_OF = {
    table: tuple(names.split())
    for table, names in {
        "adapters": (
            "id task_id step is_final weights_id config_id card_id description_id source "
            "created_at evicted_at is_generated initial_id tensors_key extra_count"
        ),
        "base_labels": "id label base_model_id reason path",
        "base_models": "id name fingerprint path shape loader load_in",
        "blobs": "id digest size",
        "codes": (
            "id task_id generator_id adapter_id blob_id bits dw_error residual_id residual_error "
            "min_gain max_error tolerance is_kept refined max_size claim"
        ),
        "documents": "id digest body",
        "evaluations": (
            "id task_id rung generator_id data_id metric nats_per_token tokens utf8_bytes "
            "retained_gain dw_error settings_id created_at score load_in"
        ),
        "extras": "adapter_id file blob_id size",
        "generators": ("id base_model_id version parent_id blob_id config metrics is_current created_at start_id"),
        "run_codes": "run_id adapter_id blob_id generator squared_error initial_is_known",
        "task_vectors": "task_id view support_set extractor_id id blob_id dim",
        "tasks": "id name base_model_id samples_id eval_id created_at pinned folder note tags label_id",
        "train_runs": "id base_model_id state config step weights_id optimizer_id created_at updated_at",
    }.items()
}
