PRAGMA application_id=1768123697;
PRAGMA user_version=2;
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
, evicted_at VARCHAR);
INSERT INTO "adapters" VALUES(1,1,NULL,1,6,7,3,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z',NULL);
INSERT INTO "adapters" VALUES(2,1,80,0,2,7,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z',NULL);
INSERT INTO "adapters" VALUES(3,1,90,0,4,7,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z',NULL);
INSERT INTO "adapters" VALUES(4,2,NULL,1,8,7,NULL,'BF16',8,1792,'["q_proj","v_proj"]',1,'loras/example','2026-11-24T16:51:22Z','2026-11-24T16:51:22Z');
INSERT INTO "adapters" VALUES(5,3,5,0,11,7,NULL,'F32',8,1792,'["q_proj"]',1,'runs/sql/checkpoint-5','2026-11-24T16:51:22Z',NULL);
INSERT INTO "adapters" VALUES(6,3,7,0,9,7,NULL,'F32',8,1792,'["q_proj"]',1,'elsewhere','2026-11-24T16:51:22Z',NULL);
INSERT INTO "adapters" VALUES(7,3,9,1,10,7,NULL,'F32',8,1792,'["q_proj"]',1,'runs/sql/checkpoint-9','2026-11-24T16:51:22Z',NULL);
CREATE TABLE base_models (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR NOT NULL UNIQUE,
    fingerprint VARCHAR,
    path VARCHAR,
    shape JSON
);
INSERT INTO "base_models" VALUES(1,'example/base-model','f00d','/models/base','{"hidden_size":64}');
INSERT INTO "base_models" VALUES(2,'other/base-model',NULL,NULL,NULL);
CREATE TABLE blobs (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, size INTEGER NOT NULL);
INSERT INTO "blobs" VALUES(1,'24baa7a731ce04b431af93d94cba8e0160a0e6a4607edc2d70c595dd098e56cf',7);
INSERT INTO "blobs" VALUES(2,'63d93cad9cf27cf3c77172a7b73aa8da62567336acd8bb4d6a32aea7a0973d1a',21);
INSERT INTO "blobs" VALUES(3,'8367cd66fdd136bba8ba23f8805bb050dd6289401c8ec3b0be44a3c233eef90d',4);
INSERT INTO "blobs" VALUES(4,'854871556c5616fb7555709f1d04cff971868a897e19700aeec2545a9087ba91',21);
INSERT INTO "blobs" VALUES(5,'a4b992ab42964e5b7112ad2609ec66bcec05b99340bbb063ec00a52af5ea9d3d',5);
INSERT INTO "blobs" VALUES(6,'dd1fc9ba529a6447f8ca9308cdc77ba4bc6df3866dfb4697863b46a013e16543',15);
INSERT INTO "blobs" VALUES(7,'fd66c57ec3933dd396b22ffd2c904bdbe96a4477c250382ee6265e2d7921fdd8',8);
INSERT INTO "blobs" VALUES(8,'4430d31d61a26e0d4d81f45556553b635f97a741c9a974dde42cb0321c5b5cc2',15);
INSERT INTO "blobs" VALUES(9,'210f697bc20fcb5d56f129ff711c2e2abcc612c9b1609c32ca17d3eda9a3c87a',8);
INSERT INTO "blobs" VALUES(10,'31df1402087374b90463e721a1088345385311f969a6c79fd2f356a95492b0e8',8);
INSERT INTO "blobs" VALUES(11,'ce2bc7c08da4b82cb4142969ef5dd958a842f63b53614cef70c8d2f782b6a633',8);
INSERT INTO "blobs" VALUES(12,'b0d51c58c8b9c1f458fadf16c7d375630ef51da4df81915893b05c0fa4ed8bc6',6);
INSERT INTO "blobs" VALUES(13,'9123dcbb0b42652b0e105956c68d3ca2ff34584f324fa41a29aedd32b883e131',9);
INSERT INTO "blobs" VALUES(14,'db06371e36a2852fcd16d243ce5947744a18072f7e7c1a31b11974008c9d8e52',12);
INSERT INTO "blobs" VALUES(15,'804f51f71254c4081e37e7c887073560f4a6fa6cdad202e9ac67e032c43ed1e1',5);
INSERT INTO "blobs" VALUES(16,'0d7ce6cc9a8cce184d011b4f21271c022777fd602b36b99e0a1214482f43d14b',12);
INSERT INTO "blobs" VALUES(17,'4ba69735ca53765ed6a709edb56c6ea236b7193a3b29a6b390c346f0f4340e4e',5);
INSERT INTO "blobs" VALUES(18,'690a8d18f75dfaa79dd8134ac62cdad42fffe0f34cb78dd14e2d3aae3ae83ad3',7);
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
INSERT INTO "codes" VALUES(1,1,1,1,14,80.5,0.01);
INSERT INTO "codes" VALUES(2,1,2,1,14,80.5,0.01);
INSERT INTO "codes" VALUES(3,2,2,4,16,80.5,0.02);
CREATE TABLE documents (id INTEGER NOT NULL PRIMARY KEY, digest VARCHAR NOT NULL UNIQUE, body JSON NOT NULL);
INSERT INTO "documents" VALUES(1,'8837d92e69b1be97e2e29fc2d76d803d2a44bc0b12492a496a3d7a8c8e9a9389','[["layers.0.q_proj",8,64,64],["layers.0.v_proj",8,64,32]]');
INSERT INTO "documents" VALUES(2,'b2c4d94b18d555fd7e053944e602d2f78f5eae8f071db5b052a7c743f43c7329','{"base":"f00d","name":"last-layer","version":1}');
INSERT INTO "documents" VALUES(3,'2b4a88a1a77a782fd3ea77e40b8c4ec796d788a9d3c5398240e5c38f6956d14b','{"base":"f00d","name":"last-layer","version":2}');
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
INSERT INTO "evaluations" VALUES(1,1,'original',NULL,'abababababababababababababababababababababababababababababababab','nll',2.0,100,400,0.97,NULL,'{"max_tokens":256,"original":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}','2026-11-24T16:51:22Z');
INSERT INTO "evaluations" VALUES(2,2,'code',1,'abababababababababababababababababababababababababababababababab','nll',2.0,100,400,0.97,NULL,'{"max_tokens":256,"original":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}','2026-11-24T16:51:22Z');
INSERT INTO "evaluations" VALUES(3,2,'code',2,'abababababababababababababababababababababababababababababababab','nll',2.0,100,400,0.97,NULL,'{"max_tokens":256,"original":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}','2026-11-24T16:51:22Z');
INSERT INTO "evaluations" VALUES(4,1,'base',NULL,'a4b992ab42964e5b7112ad2609ec66bcec05b99340bbb063ec00a52af5ea9d3d','nll',1.5,100,400,NULL,NULL,'{"max_tokens":256,"original":"cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd"}','2026-11-24T16:51:22Z');
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
INSERT INTO "generators" VALUES(1,1,1,NULL,13,'{"quality":4}','{"bits":1.5}',0,'2026-11-24T16:51:22Z');
INSERT INTO "generators" VALUES(2,1,2,1,15,'{"quality":4}','{"bits":1.5}',1,'2026-11-24T16:51:22Z');
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
INSERT INTO "task_vectors" VALUES(1,1,'context',0,2,12,64);
INSERT INTO "task_vectors" VALUES(2,1,'context',1,2,12,64);
INSERT INTO "task_vectors" VALUES(3,1,'adapted',0,2,12,64);
INSERT INTO "task_vectors" VALUES(4,1,'context',0,3,12,64);
CREATE TABLE tasks (
    id INTEGER NOT NULL PRIMARY KEY,
    name VARCHAR COLLATE "NOCASE" NOT NULL UNIQUE,
    base_model_id INTEGER NOT NULL REFERENCES base_models (id),
    samples_id INTEGER REFERENCES blobs (id),
    eval_id INTEGER REFERENCES blobs (id),
    created_at VARCHAR NOT NULL
, pinned BOOLEAN DEFAULT 0 NOT NULL);
INSERT INTO "tasks" VALUES(1,'rust',1,1,5,'2026-11-24T16:51:22Z',1);
INSERT INTO "tasks" VALUES(2,'HTML',1,NULL,NULL,'2026-11-24T16:51:22Z',0);
INSERT INTO "tasks" VALUES(3,'sql',2,NULL,NULL,'2026-11-24T16:51:22Z',0);
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
INSERT INTO "train_runs" VALUES(1,2,'running','{"steps":2}',0,NULL,NULL,'2026-11-24T16:51:22Z','2026-11-24T16:51:22Z');
INSERT INTO "train_runs" VALUES(2,1,'running','{"steps":3}',2,17,18,'2026-11-24T16:51:22Z','2026-11-24T16:51:22Z');
CREATE UNIQUE INDEX one_row_per_adapter ON adapters (task_id, weights_id, config_id, coalesce(step, -1));
CREATE UNIQUE INDEX one_final_adapter ON adapters (task_id) WHERE is_final;
CREATE UNIQUE INDEX one_current_generator ON generators (base_model_id) WHERE is_current;
CREATE UNIQUE INDEX one_running_train_run ON train_runs (base_model_id) WHERE state = 'running';
CREATE UNIQUE INDEX one_row_per_evaluation ON evaluations (task_id, rung, coalesce(generator_id, -1), data, metric);
COMMIT;
