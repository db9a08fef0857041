CREATE TABLE blobs (
    id INTEGER NOT NULL, 
    digest BLOB NOT NULL, 
    size INTEGER NOT NULL, 
    PRIMARY KEY (id), 
    UNIQUE (digest)
);
CREATE TABLE documents (
    id INTEGER NOT NULL, 
    digest BLOB NOT NULL, 
    body BLOB NOT NULL, 
    PRIMARY KEY (id), 
    UNIQUE (digest)
);
CREATE TABLE base_models (
    id INTEGER NOT NULL, 
    name VARCHAR NOT NULL, 
    fingerprint VARCHAR, 
    path VARCHAR, 
    shape BLOB, 
    PRIMARY KEY (id), 
    UNIQUE (name)
);
CREATE TABLE tasks (
    id INTEGER NOT NULL, 
    name VARCHAR COLLATE "NOCASE" NOT NULL, 
    base_model_id INTEGER NOT NULL, 
    samples_id INTEGER, 
    eval_id INTEGER, 
    created_at INTEGER NOT NULL, 
    pinned BOOLEAN DEFAULT 0 NOT NULL, 
    folder VARCHAR NOT NULL, 
    PRIMARY KEY (id), 
    UNIQUE (name), 
    FOREIGN KEY(base_model_id) REFERENCES base_models (id), 
    FOREIGN KEY(samples_id) REFERENCES blobs (id), 
    FOREIGN KEY(eval_id) REFERENCES blobs (id)
);
CREATE TABLE generators (
    id INTEGER NOT NULL, 
    base_model_id INTEGER NOT NULL, 
    version INTEGER NOT NULL, 
    parent_id INTEGER, 
    blob_id INTEGER NOT NULL, 
    config BLOB NOT NULL, 
    metrics BLOB NOT NULL, 
    is_current BOOLEAN NOT NULL, 
    created_at INTEGER NOT NULL, 
    start_id INTEGER, 
    PRIMARY KEY (id), 
    UNIQUE (base_model_id, version), 
    FOREIGN KEY(base_model_id) REFERENCES base_models (id), 
    FOREIGN KEY(parent_id) REFERENCES generators (id) ON DELETE SET NULL, 
    FOREIGN KEY(blob_id) REFERENCES blobs (id), 
    FOREIGN KEY(start_id) REFERENCES blobs (id)
);
CREATE UNIQUE INDEX one_current_generator ON generators (base_model_id) WHERE is_current;
CREATE TABLE train_runs (
    id INTEGER NOT NULL, 
    base_model_id INTEGER NOT NULL, 
    state VARCHAR NOT NULL, 
    config BLOB NOT NULL, 
    step INTEGER NOT NULL, 
    weights_id INTEGER, 
    optimizer_id INTEGER, 
    created_at INTEGER NOT NULL, 
    updated_at INTEGER NOT NULL, 
    PRIMARY KEY (id), 
    FOREIGN KEY(base_model_id) REFERENCES base_models (id), 
    FOREIGN KEY(weights_id) REFERENCES blobs (id), 
    FOREIGN KEY(optimizer_id) REFERENCES blobs (id)
);
CREATE UNIQUE INDEX one_running_train_run ON train_runs (base_model_id) WHERE state = 'running';
CREATE TABLE adapters (
    id INTEGER NOT NULL, 
    task_id INTEGER NOT NULL, 
    step INTEGER, 
    is_final BOOLEAN NOT NULL, 
    weights_id INTEGER NOT NULL, 
    config_id INTEGER NOT NULL, 
    card_id INTEGER, 
    description_id INTEGER NOT NULL, 
    source VARCHAR, 
    created_at INTEGER NOT NULL, 
    evicted_at INTEGER, 
    is_generated BOOLEAN DEFAULT 0 NOT NULL, 
    PRIMARY KEY (id), 
    FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE, 
    FOREIGN KEY(weights_id) REFERENCES blobs (id), 
    FOREIGN KEY(config_id) REFERENCES blobs (id), 
    FOREIGN KEY(card_id) REFERENCES blobs (id), 
    FOREIGN KEY(description_id) REFERENCES documents (id)
);
CREATE UNIQUE INDEX one_final_adapter ON adapters (task_id) WHERE is_final;
CREATE UNIQUE INDEX one_row_per_adapter ON adapters (task_id, weights_id, config_id, coalesce(step, -1));
CREATE TABLE task_vectors (
    task_id INTEGER NOT NULL, 
    "view" INTEGER NOT NULL, 
    support_set INTEGER NOT NULL, 
    extractor_id INTEGER NOT NULL, 
    id INTEGER NOT NULL, 
    blob_id INTEGER NOT NULL, 
    dim INTEGER NOT NULL, 
    PRIMARY KEY (task_id, "view", support_set, extractor_id), 
    FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE, 
    FOREIGN KEY(extractor_id) REFERENCES documents (id), 
    FOREIGN KEY(blob_id) REFERENCES blobs (id)
)
 WITHOUT ROWID;
CREATE TABLE evaluations (
    id INTEGER NOT NULL, 
    task_id INTEGER NOT NULL, 
    rung INTEGER NOT NULL, 
    generator_id INTEGER, 
    data_id INTEGER NOT NULL, 
    metric INTEGER NOT NULL, 
    nats_per_token DOUBLE NOT NULL, 
    tokens INTEGER NOT NULL, 
    utf8_bytes INTEGER NOT NULL, 
    retained_gain DOUBLE, 
    dw_error DOUBLE, 
    settings_id INTEGER NOT NULL, 
    created_at INTEGER NOT NULL, 
    PRIMARY KEY (id), 
    FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE, 
    FOREIGN KEY(generator_id) REFERENCES generators (id) ON DELETE CASCADE, 
    FOREIGN KEY(data_id) REFERENCES blobs (id), 
    FOREIGN KEY(settings_id) REFERENCES documents (id)
);
CREATE UNIQUE INDEX one_row_per_evaluation ON evaluations (task_id, rung, coalesce(generator_id, -1), data_id, metric);
CREATE TABLE codes (
    id INTEGER NOT NULL, 
    task_id INTEGER NOT NULL, 
    generator_id INTEGER NOT NULL, 
    adapter_id INTEGER NOT NULL, 
    blob_id INTEGER NOT NULL, 
    bits DOUBLE NOT NULL, 
    dw_error DOUBLE, 
    residual_id INTEGER, 
    residual_error DOUBLE, 
    min_gain DOUBLE, 
    max_error DOUBLE, 
    tolerance DOUBLE, 
    is_kept BOOLEAN, 
    refined INTEGER, 
    PRIMARY KEY (id), 
    UNIQUE (task_id, generator_id), 
    FOREIGN KEY(task_id) REFERENCES tasks (id) ON DELETE CASCADE, 
    FOREIGN KEY(generator_id) REFERENCES generators (id) ON DELETE CASCADE, 
    FOREIGN KEY(adapter_id) REFERENCES adapters (id) ON DELETE CASCADE, 
    FOREIGN KEY(blob_id) REFERENCES blobs (id), 
    FOREIGN KEY(residual_id) REFERENCES blobs (id)
);
