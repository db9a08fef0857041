PRAGMA application_id=1768123697;
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE adapters (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    step INTEGER,
    is_final BOOLEAN NOT NULL,
    weights_id INTEGER NOT NULL REFERENCES blobs (id),
    config_id INTEGER NOT NULL REFERENCES blobs (id),
    card_id INTEGER REFERENCES blobs (id),
    dtype VARCHAR NOT NULL,
    rank_max INTEGER NOT NULL,
    parameters INTEGER NOT NULL,
    target_modules JSON NOT NULL,
    layout_id INTEGER NOT NULL REFERENCES documents (id),
    source VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL
);
INSERT INTO "adapters" VALUES(1,1,NULL,1,1,2,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z');
INSERT INTO "adapters" VALUES(2,1,80,0,3,2,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z');
INSERT INTO "adapters" VALUES(3,1,90,0,4,2,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z');
CREATE TABLE base_models (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    fingerprint VARCHAR,
    path VARCHAR,
    shape JSON
);
INSERT INTO "base_models" VALUES(1,'example/base-model',NULL,NULL,NULL);
CREATE TABLE blobs (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, size INTEGER NOT NULL);
INSERT INTO "blobs" VALUES(1,'7fd7cec17549315dc9b5fe8ac8035def4642c335998d5a0481fa189e28520a19',22);
INSERT INTO "blobs" VALUES(2,'fd66c57ec3933dd396b22ffd2c904bdbe96a4477c250382ee6265e2d7921fdd8',8);
INSERT INTO "blobs" VALUES(3,'2c7aca6f05c5ed8f67c572ec8a3843182bdec998643a42dbe291ee984fd2a99c',28);
INSERT INTO "blobs" VALUES(4,'c803a10a2a2bfebf83ec54ab3627d265adb649de81a8ddc7fa0fc163f2c05c93',28);
CREATE TABLE codes (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    generator_id INTEGER NOT NULL REFERENCES generators (id) ON DELETE CASCADE,
    adapter_id INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    bits DOUBLE NOT NULL,
    dw_error DOUBLE,
    UNIQUE (task_id, generator_id)
);
CREATE TABLE documents (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, body JSON NOT NULL);
INSERT INTO "documents" VALUES(1,'8837d92e69b1be97e2e29fc2d76d803d2a44bc0b12492a496a3d7a8c8e9a9389','[["layers.0.q_proj",8,64,64],["layers.0.v_proj",8,64,32]]');
CREATE TABLE evaluations (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    rung VARCHAR NOT NULL,
    generator_id INTEGER REFERENCES generators (id) ON DELETE CASCADE,
    data VARCHAR NOT NULL,
    metric VARCHAR NOT NULL,
    nats_per_token DOUBLE NOT NULL,
    tokens INTEGER NOT NULL,
    utf8_bytes INTEGER NOT NULL,
    retained_gain DOUBLE,
    dw_error DOUBLE,
    settings JSON NOT NULL,
    created_at VARCHAR NOT NULL
);
CREATE TABLE generators (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    version INTEGER NOT NULL,
    parent_id INTEGER REFERENCES generators (id) ON DELETE SET NULL,
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    config JSON NOT NULL,
    metrics JSON NOT NULL,
    is_current BOOLEAN NOT NULL,
    created_at VARCHAR NOT NULL,
    UNIQUE (base_model_id, version)
);
CREATE TABLE task_vectors (
    id INTEGER NOT NULL PRIMARY KEY,
    task_id INTEGER NOT NULL REFERENCES tasks (id) ON DELETE CASCADE,
    view VARCHAR NOT NULL,
    support_set INTEGER NOT NULL,
    extractor_id INTEGER NOT NULL REFERENCES documents (id),
    blob_id INTEGER NOT NULL REFERENCES blobs (id),
    dim INTEGER NOT NULL,
    UNIQUE (task_id, view, support_set, extractor_id)
);
CREATE TABLE tasks (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR COLLATE "NOCASE" NOT NULL UNIQUE,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    samples_id INTEGER REFERENCES blobs (id),
    eval_id INTEGER REFERENCES blobs (id),
    created_at VARCHAR NOT NULL
);
INSERT INTO "tasks" VALUES(1,'shakespeare',1,NULL,NULL,'2026-11-24T16:51:22Z');
CREATE TABLE train_runs (
    id INTEGER NOT NULL PRIMARY KEY,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    state VARCHAR NOT NULL,
    config JSON NOT NULL,
    step INTEGER NOT NULL,
    weights_id INTEGER REFERENCES blobs (id),
    optimizer_id INTEGER REFERENCES blobs (id),
    created_at VARCHAR NOT NULL,
    updated_at VARCHAR NOT NULL
);
CREATE UNIQUE INDEX one_row_per_adapter ON adapters (task_id, weights_id, config_id, coalesce(step, -1));
CREATE UNIQUE INDEX one_final_adapter ON adapters (task_id) WHERE is_final;
CREATE UNIQUE INDEX one_current_generator ON generators (base_model_id) WHERE is_current;
CREATE UNIQUE INDEX one_running_train_run ON train_runs (base_model_id) WHERE state = 'running';
CREATE UNIQUE INDEX one_row_per_evaluation ON evaluations (task_id, rung, coalesce(generator_id, -1), data, metric);
COMMIT;
