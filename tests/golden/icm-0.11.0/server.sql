--
-- PostgreSQL database dump
--

\restrict 5pEduY7fb7gb5h10vGW6hox7JvFqQ5ZL7M9iB3PdCPDu4zpQLw8TL5xmeHVC4aY

-- Dumped from database version 18.4
-- Dumped by pg_dump version 18.4

SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;

--
-- Name: icm_count_extras(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_count_extras() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN UPDATE adapters SET extra_count = extra_count + 1 WHERE id = NEW.adapter_id;
    ELSE UPDATE adapters SET extra_count = extra_count - 1 WHERE id = OLD.adapter_id; END IF;
    RETURN NULL;
END $$;


--
-- Name: icm_write_adapters(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_adapters() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'adapters', CAST(OLD.id AS VARCHAR), CAST(OLD.task_id AS VARCHAR), CAST(OLD.step AS VARCHAR), CAST(CAST(OLD.is_final AS INTEGER) AS VARCHAR), CAST(OLD.weights_id AS VARCHAR), CAST(OLD.config_id AS VARCHAR), CAST(OLD.card_id AS VARCHAR), CAST(OLD.description_id AS VARCHAR), CAST(OLD.source AS VARCHAR), CAST(OLD.created_at AS VARCHAR), CAST(OLD.evicted_at AS VARCHAR), CAST(CAST(OLD.is_generated AS INTEGER) AS VARCHAR), CAST(OLD.initial_id AS VARCHAR), encode(OLD.tensors_key, 'hex'), CAST(OLD.extra_count AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_base_labels(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_base_labels() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'base_labels', CAST(OLD.id AS VARCHAR), CAST(OLD.label AS VARCHAR), CAST(OLD.base_model_id AS VARCHAR), CAST(OLD.reason AS VARCHAR), CAST(OLD.path AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_base_models(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_base_models() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'base_models', CAST(OLD.id AS VARCHAR), CAST(OLD.name AS VARCHAR), CAST(OLD.fingerprint AS VARCHAR), CAST(OLD.path AS VARCHAR), encode(OLD.shape, 'hex'), CAST(OLD.loader AS VARCHAR), CAST(OLD.load_in AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_blobs(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_blobs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'blobs', CAST(OLD.id AS VARCHAR), encode(OLD.digest, 'hex'), CAST(OLD.size AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_codes(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_codes() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'codes', CAST(OLD.id AS VARCHAR), CAST(OLD.task_id AS VARCHAR), CAST(OLD.generator_id AS VARCHAR), CAST(OLD.adapter_id AS VARCHAR), CAST(OLD.blob_id AS VARCHAR), CAST(OLD.bits AS VARCHAR), CAST(OLD.dw_error AS VARCHAR), CAST(OLD.residual_id AS VARCHAR), CAST(OLD.residual_error AS VARCHAR), CAST(OLD.min_gain AS VARCHAR), CAST(OLD.max_error AS VARCHAR), CAST(OLD.tolerance AS VARCHAR), CAST(CAST(OLD.is_kept AS INTEGER) AS VARCHAR), CAST(OLD.refined AS VARCHAR), CAST(OLD.max_size AS VARCHAR), encode(OLD.claim, 'hex'), CAST(OLD.keep AS VARCHAR), CAST(OLD.effect AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_documents(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_documents() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'documents', CAST(OLD.id AS VARCHAR), encode(OLD.digest, 'hex'), encode(OLD.body, 'hex')]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_evaluations(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_evaluations() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'evaluations', CAST(OLD.id AS VARCHAR), CAST(OLD.task_id AS VARCHAR), CAST(OLD.rung AS VARCHAR), CAST(OLD.generator_id AS VARCHAR), CAST(OLD.data_id AS VARCHAR), CAST(OLD.metric AS VARCHAR), CAST(OLD.nats_per_token AS VARCHAR), CAST(OLD.tokens AS VARCHAR), CAST(OLD.utf8_bytes AS VARCHAR), CAST(OLD.retained_gain AS VARCHAR), CAST(OLD.dw_error AS VARCHAR), CAST(OLD.settings_id AS VARCHAR), CAST(OLD.created_at AS VARCHAR), encode(OLD.score, 'hex'), CAST(OLD.load_in AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_extras(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_extras() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'extras', CAST(OLD.adapter_id AS VARCHAR), CAST(OLD.file AS VARCHAR), CAST(OLD.blob_id AS VARCHAR), CAST(OLD.size AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_generators(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_generators() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'generators', CAST(OLD.id AS VARCHAR), CAST(OLD.base_model_id AS VARCHAR), CAST(OLD.version AS VARCHAR), CAST(OLD.parent_id AS VARCHAR), CAST(OLD.blob_id AS VARCHAR), encode(OLD.config, 'hex'), encode(OLD.metrics, 'hex'), CAST(CAST(OLD.is_current AS INTEGER) AS VARCHAR), CAST(OLD.created_at AS VARCHAR), CAST(OLD.start_id AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_run_codes(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_run_codes() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'run_codes', CAST(OLD.run_id AS VARCHAR), CAST(OLD.adapter_id AS VARCHAR), CAST(OLD.blob_id AS VARCHAR), encode(OLD.generator, 'hex'), CAST(OLD.squared_error AS VARCHAR), CAST(CAST(OLD.initial_is_known AS INTEGER) AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_task_vectors(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_task_vectors() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'task_vectors', CAST(OLD.task_id AS VARCHAR), CAST(OLD.view AS VARCHAR), CAST(OLD.support_set AS VARCHAR), CAST(OLD.extractor_id AS VARCHAR), CAST(OLD.id AS VARCHAR), CAST(OLD.blob_id AS VARCHAR), CAST(OLD.dim AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_tasks(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_tasks() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'tasks', CAST(OLD.id AS VARCHAR), CAST(OLD.name AS VARCHAR), CAST(OLD.base_model_id AS VARCHAR), CAST(OLD.samples_id AS VARCHAR), CAST(OLD.eval_id AS VARCHAR), CAST(OLD.created_at AS VARCHAR), CAST(CAST(OLD.pinned AS INTEGER) AS VARCHAR), CAST(OLD.folder AS VARCHAR), CAST(OLD.note AS VARCHAR), CAST(OLD.tags AS VARCHAR), CAST(OLD.label_id AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


--
-- Name: icm_write_train_runs(); Type: FUNCTION; Schema: public; Owner: -
--

CREATE FUNCTION public.icm_write_train_runs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.crc IS NOT NULL THEN INSERT INTO pg_temp.icm_rows_before VALUES (ARRAY[OLD.crc::text, 'train_runs', CAST(OLD.id AS VARCHAR), CAST(OLD.base_model_id AS VARCHAR), CAST(OLD.state AS VARCHAR), encode(OLD.config, 'hex'), CAST(OLD.step AS VARCHAR), CAST(OLD.weights_id AS VARCHAR), CAST(OLD.optimizer_id AS VARCHAR), CAST(OLD.created_at AS VARCHAR), CAST(OLD.updated_at AS VARCHAR)]); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.crc IS NOT NULL THEN NEW.crc := NULL; END IF;
    RETURN NEW;
END $$;


SET default_tablespace = '';

SET default_table_access_method = heap;

--
-- Name: adapters; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.adapters (
    id bigint NOT NULL,
    task_id bigint NOT NULL,
    step bigint,
    is_final boolean NOT NULL,
    weights_id bigint NOT NULL,
    config_id bigint NOT NULL,
    card_id bigint,
    description_id bigint NOT NULL,
    source character varying,
    created_at bigint NOT NULL,
    evicted_at bigint,
    is_generated boolean DEFAULT false NOT NULL,
    initial_id bigint,
    tensors_key bytea,
    extra_count bigint DEFAULT 0 NOT NULL,
    crc integer
);


--
-- Name: adapters_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.adapters_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: adapters_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.adapters_id_seq OWNED BY public.adapters.id;


--
-- Name: alembic_version; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);


--
-- Name: base_labels; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.base_labels (
    id bigint NOT NULL,
    label character varying NOT NULL,
    base_model_id bigint NOT NULL,
    reason integer NOT NULL,
    path character varying,
    crc integer
);


--
-- Name: base_labels_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.base_labels_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: base_labels_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.base_labels_id_seq OWNED BY public.base_labels.id;


--
-- Name: base_models; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.base_models (
    id bigint NOT NULL,
    name character varying NOT NULL,
    fingerprint character varying,
    path character varying,
    shape bytea,
    loader character varying,
    load_in integer,
    crc integer
);


--
-- Name: base_models_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.base_models_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: base_models_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.base_models_id_seq OWNED BY public.base_models.id;


--
-- Name: blobs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.blobs (
    id bigint NOT NULL,
    digest bytea NOT NULL,
    size bigint NOT NULL,
    crc integer
);


--
-- Name: blobs_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.blobs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: blobs_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.blobs_id_seq OWNED BY public.blobs.id;


--
-- Name: codes; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.codes (
    id bigint NOT NULL,
    task_id bigint NOT NULL,
    generator_id bigint NOT NULL,
    adapter_id bigint NOT NULL,
    blob_id bigint NOT NULL,
    bits double precision NOT NULL,
    dw_error double precision,
    residual_id bigint,
    residual_error double precision,
    min_gain double precision,
    max_error double precision,
    tolerance double precision,
    is_kept boolean,
    refined bigint,
    max_size bigint,
    claim bytea,
    keep double precision,
    effect double precision,
    crc integer
);


--
-- Name: codes_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.codes_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: codes_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.codes_id_seq OWNED BY public.codes.id;


--
-- Name: documents; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.documents (
    id bigint NOT NULL,
    digest bytea NOT NULL,
    body bytea NOT NULL,
    crc integer
);


--
-- Name: documents_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.documents_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: documents_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.documents_id_seq OWNED BY public.documents.id;


--
-- Name: evaluations; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.evaluations (
    id bigint NOT NULL,
    task_id bigint NOT NULL,
    rung integer NOT NULL,
    generator_id bigint,
    data_id bigint NOT NULL,
    metric integer NOT NULL,
    nats_per_token double precision NOT NULL,
    tokens bigint NOT NULL,
    utf8_bytes bigint NOT NULL,
    retained_gain double precision,
    dw_error double precision,
    settings_id bigint NOT NULL,
    created_at bigint NOT NULL,
    score bytea,
    load_in integer,
    crc integer
);


--
-- Name: evaluations_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.evaluations_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: evaluations_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.evaluations_id_seq OWNED BY public.evaluations.id;


--
-- Name: extras; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.extras (
    adapter_id bigint NOT NULL,
    file character varying NOT NULL,
    blob_id bigint NOT NULL,
    size bigint NOT NULL,
    crc integer
);


--
-- Name: generators; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.generators (
    id bigint NOT NULL,
    base_model_id bigint NOT NULL,
    version bigint NOT NULL,
    parent_id bigint,
    blob_id bigint NOT NULL,
    config bytea NOT NULL,
    metrics bytea NOT NULL,
    is_current boolean NOT NULL,
    created_at bigint NOT NULL,
    start_id bigint,
    crc integer
);


--
-- Name: generators_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.generators_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: generators_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.generators_id_seq OWNED BY public.generators.id;


--
-- Name: place; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.place (
    number character varying NOT NULL,
    blobs character varying NOT NULL,
    changes bigint NOT NULL,
    crc integer NOT NULL
);


--
-- Name: run_codes; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.run_codes (
    run_id bigint NOT NULL,
    adapter_id bigint NOT NULL,
    blob_id bigint NOT NULL,
    generator bytea NOT NULL,
    squared_error double precision NOT NULL,
    initial_is_known boolean NOT NULL,
    crc integer
);


--
-- Name: task_vectors; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.task_vectors (
    task_id bigint NOT NULL,
    view integer NOT NULL,
    support_set bigint NOT NULL,
    extractor_id bigint NOT NULL,
    id bigint NOT NULL,
    blob_id bigint NOT NULL,
    dim bigint NOT NULL,
    crc integer
);


--
-- Name: tasks; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.tasks (
    id bigint NOT NULL,
    name character varying NOT NULL COLLATE pg_catalog."C",
    base_model_id bigint NOT NULL,
    samples_id bigint,
    eval_id bigint,
    created_at bigint NOT NULL,
    pinned boolean DEFAULT false NOT NULL,
    folder character varying NOT NULL,
    note character varying,
    tags character varying,
    label_id bigint,
    crc integer
);


--
-- Name: tasks_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.tasks_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: tasks_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.tasks_id_seq OWNED BY public.tasks.id;


--
-- Name: train_runs; Type: TABLE; Schema: public; Owner: -
--

CREATE TABLE public.train_runs (
    id bigint NOT NULL,
    base_model_id bigint NOT NULL,
    state character varying NOT NULL,
    config bytea NOT NULL,
    step bigint NOT NULL,
    weights_id bigint,
    optimizer_id bigint,
    created_at bigint NOT NULL,
    updated_at bigint NOT NULL,
    crc integer
);


--
-- Name: train_runs_id_seq; Type: SEQUENCE; Schema: public; Owner: -
--

CREATE SEQUENCE public.train_runs_id_seq
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;


--
-- Name: train_runs_id_seq; Type: SEQUENCE OWNED BY; Schema: public; Owner: -
--

ALTER SEQUENCE public.train_runs_id_seq OWNED BY public.train_runs.id;


--
-- Name: adapters id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters ALTER COLUMN id SET DEFAULT nextval('public.adapters_id_seq'::regclass);


--
-- Name: base_labels id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_labels ALTER COLUMN id SET DEFAULT nextval('public.base_labels_id_seq'::regclass);


--
-- Name: base_models id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_models ALTER COLUMN id SET DEFAULT nextval('public.base_models_id_seq'::regclass);


--
-- Name: blobs id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blobs ALTER COLUMN id SET DEFAULT nextval('public.blobs_id_seq'::regclass);


--
-- Name: codes id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes ALTER COLUMN id SET DEFAULT nextval('public.codes_id_seq'::regclass);


--
-- Name: documents id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.documents ALTER COLUMN id SET DEFAULT nextval('public.documents_id_seq'::regclass);


--
-- Name: evaluations id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations ALTER COLUMN id SET DEFAULT nextval('public.evaluations_id_seq'::regclass);


--
-- Name: generators id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators ALTER COLUMN id SET DEFAULT nextval('public.generators_id_seq'::regclass);


--
-- Name: tasks id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks ALTER COLUMN id SET DEFAULT nextval('public.tasks_id_seq'::regclass);


--
-- Name: train_runs id; Type: DEFAULT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.train_runs ALTER COLUMN id SET DEFAULT nextval('public.train_runs_id_seq'::regclass);


--
-- Data for Name: adapters; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.adapters (id, task_id, step, is_final, weights_id, config_id, card_id, description_id, source, created_at, evicted_at, is_generated, initial_id, tensors_key, extra_count, crc) FROM stdin;
1	1	10	f	4	5	\N	1	\N	1795920286	1795920290	f	\N	\\xe14a12c14c6bb0e0	0	1075842881
2	1	20	f	6	5	\N	1	\N	1795920286	1795920290	f	\N	\\x778923616f2ea323	0	-1437779958
3	1	\N	t	7	5	8	1	\N	1795920286	1795920290	f	\N	\\x14b85c5354d5ad5c	0	-1874518969
4	2	\N	t	11	12	\N	4	\N	1795920286	\N	f	\N	\\x5edf1cd019e68d31	0	-624575350
5	3	\N	t	15	16	\N	6	\N	1795920286	\N	f	\N	\\x926965044a3c9fec	0	119037899
\.


--
-- Data for Name: alembic_version; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.alembic_version (version_num) FROM stdin;
10
\.


--
-- Data for Name: base_labels; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.base_labels (id, label, base_model_id, reason, path, crc) FROM stdin;
\.


--
-- Data for Name: base_models; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.base_models (id, name, fingerprint, path, shape, loader, load_in, crc) FROM stdin;
1	tiny/llama	98385df12f7bfaedca6d1722ad9e4f3319ffbe60c6f570d05b466e947462bde1	\N	\\x78da0dc64b0ec2300c05c0bb78dd05cec7afc965906b3ba2524188b001c4dd6156f3a1cbee1eb7f3dcdf413da7850e7dc56352ff773ef57aa74e150cd16449b04a6137b4368a45c9cd44347cb361761246605b23334b754685a28db04cdf1f79f81e82	\N	\N	-1695962389
\.


--
-- Data for Name: blobs; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.blobs (id, digest, size, crc) FROM stdin;
1	\\xda330e9b1261c5b50339c09806a8fdd5cf5499b84a06593a0810b80eba80e72f	3559	1165080758
2	\\x59a56f599c96c2134d413d3a8b30d09f03f2670afc02b5c1478bb461843639f2	422	364019494
3	\\x7a216a72267687a1e6760d596f8e68703af26e676703f71a9fc7aa796a9f0db0	52	-972983553
4	\\xbcfdd2fd2fb304cea2288b7e308702709d9829987860fbf9cfbc85da30dd9d97	2808	-1985376077
5	\\xb474e3656fee2264435fbbe7e0901dd84d89bb1ed7306677a839a11fc24195b8	153	235279505
6	\\x2fb40dda93db272ec4b30071d28edbb8e42c7f9804ce377f975911ca56ea20b1	2808	-610810461
7	\\xd48e66cd33ea941fe3f7ede18e7ae547700b5a883c35ec833f02a21d2ee6fbc4	2808	-1846701024
8	\\x8520107643756a1bdcfde7581686a428135101b55b8840f4dc23544b202e1783	8	1225314368
9	\\xf02596941528fca9ad080407a715d32b7f81e8070104afd9c0e17a9be428f1db	90	970871181
10	\\xe39f64896a56e5a663bc0b7905769f8e5617bc00c974423ddc1d7cdaee52a399	189	-2125578239
11	\\xa3dbff18f4f8026dd7167102d72e2024b403b93d6fce6c75eb27fc3f89073d4b	8160	1124058126
12	\\x62541513b7d256c8300aa431b2fab078aa73b8747c63dc5f5507076dbaa91de2	166	1034894885
13	\\xe4f5a3b1374ca9f2bac87adff4e9626ad484537c448e9e2eb27ab720a1ecebc9	82	-1304892024
14	\\x29a6543abf8d71a798b82c5ef321194c4354783dc23fc8f4a037ce8844293bce	523	-1787617474
15	\\xe445b69894a93a88124a1bad02de776adb2c9dfee89876f360069366e73c1407	912	-150953104
16	\\xdb3bca3f0549b89ed6dc4cd8139c36be772a06d8b248e5a2b2794d883bef7d67	143	1252007198
17	\\x11af970d8bf517e5e3420c2dc47f6694e20231e801f759cda49b52c6c61df31f	50	1543349162
18	\\x76abdeb2ba9edb096c236774ac8a5df4233f037783e511511634bc9547b197f4	124	-80783382
19	\\x86fe8915cc5c0735d4806e03989ba791a7668042caf34f35ae4040af64c30c84	110	2124741064
\.


--
-- Data for Name: codes; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.codes (id, task_id, generator_id, adapter_id, blob_id, bits, dw_error, residual_id, residual_error, min_gain, max_error, tolerance, is_kept, refined, max_size, claim, keep, effect, crc) FROM stdin;
1	1	1	3	10	1512	0.48479229681191094	\N	\N	\N	\N	\N	t	2	\N	\N	0.8	0.9216775619055768	-1431851014
2	2	1	4	14	4184	0.15778253480541513	\N	\N	\N	\N	0.11	t	\N	\N	\N	\N	\N	-2007176075
3	3	1	5	18	992	0.10002797139330506	19	0.00982316250430346	\N	0.010000000000000002	\N	t	\N	\N	\N	\N	\N	736217051
\.


--
-- Data for Name: documents; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.documents (id, digest, body, crc) FROM stdin;
1	\\x348a73a4a8e7b9b8028b4a2ac4daee014ab0df9c43b481d9713c878955deeb4d	\\x78da8b5672333652d231d23131b1d089562a8c2f28cacf52d2512a83306275a2a39572f3535273f472122b538b8af50cf48a5373d2e2134b4af2f460aa8d748c4108a818b7da3264b58666186a0d4930d7108fb9b13a4a05a969254a3a79a539393a698939c5a93a4a4ab100d8254aea	2128346628
2	\\x326c04be268421921b58ba6396331cd09ec894d0f6c107c500b16e3232a8f0ad	\\x78da3d8ddb0ec2200c86df856b4d06636cf3654c598b1215c8e83cc677b7d3c4bbf6fb4f2fe5a192daa97168870e8336a1f701082770a87b630047b2a16df5188227d74c2e747d834de7ad7334dade3ae391b4da28e44759ab7c386760ed0425b8ace41811296d2b0393d04acc311daadabdd49413d39df79c4f948474da88012ee54c7fa6cdf00ded6b7c4addfa2ca5e45900b1e8f62d242ff3b46efdb25566ae34d79893e4e58e741311100a13aaf7076e5d4fc3	1218069261
3	\\x5ed2f560857769444a188e45757892c2a6fe53e806db3b6420cf9730e338a0af	\\x78da3d8d590e83201086efc2739b08222e9769c0195a5205236337e3dd3bb64ddf66be7f5b85b3194527daa66c2af052f9da798bd05b03b256ca428bda97a56cbd77688adef8aa2ea0a89c36065b5d6ba31ca0140701f49cf62ae78764491a46d18e3bb904008cc74c96906946a210cf5974abe853247cd089d21523934a2a36d8711af0cfa46a3ea1530e2faedb9f659ad2cc008975bd3149cbdcef5bdf6ce6991bce39a4c879be03de59fcad89ed0d6f6b4ff5	924034900
4	\\xd7961410a0dedf6653f13ad247ca3a7ac3abbfcbb56c55abe343d9e106f50606	\\x78da958e4d0ac2301085ef32eb61303ff4085e228412e86461a749da44c4db1b10a58814ddbdc5f7defb1c9c8d06b4a886c1a28329dfd258b67c0184f915d667f0e81c2c7962210977de2a9d689142bb8ec5be6274273fc1ca12c7d05aa2f9cd1add6f0fd975cf7ed955bf0aa83f04d4818047281c1b60ba8a600c521901fc038a3b69ed	-2142303405
5	\\x175906df42f87936a42c189fdf3c5b99f31792657ec193703e8d3bce44538519	\\x78da15cc310e83300c00c0bf78ee90388943f84c65c7f602944a642842fd7bcb7ac35d207c18ccd0a63415f5885ec5d9b43369ac88accdb2a7149bbb18854e5e6ad050241359cb35138a5a8407e838df77e5ebce23e15f36fe3cc7bed8eb80190b7d7ff2502089	-862003758
6	\\x35e96d423529d739ba5b89eef80abc96d0b83790059fd0c3bac658642bd244a2	\\x78da7dcb310a80301004c0bf6cbd04a320f8013f118204bc14729a60a2e0efb5b0b1b19f7118bb16b41c7a3a9c53ded3024fe7b0a659d468b8642fa63145344ea1d6cdbce8395d4bdb3ff86bed8ff5449658c1ed50650c5a8480bf0126552ac2	-1965308202
7	\\x7439e255866ac780fd090de8b58caee4473bc16bd61528ba8f7e91ae4f93a54d	\\x78da3d8dcb6ec3201045ff85752b198cb19d9f8906cfa5454d009949fa88f2ef1d77d1ddccb9af8789d4614e665dc665e2645d9a6322f04681edec1cf10a9fc6d1ae294584610b699a071ea6e843c0ea671f5c6458f36258bedb5115d3a592d8a0a8d0f520ef9919e5b50b09947688e4f2d6cde961b65a045f7296fa81a264b24e0d746d17fc33eb96bfd0b9e71fad3b9e5b6b75570051dd3f95d4dbbe1d5b6daf115d57eed87bae45e37a677caa464c4dc0e6f90b1be14f59	1131401050
\.


--
-- Data for Name: evaluations; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.evaluations (id, task_id, rung, generator_id, data_id, metric, nats_per_token, tokens, utf8_bytes, retained_gain, dw_error, settings_id, created_at, score, load_in, crc) FROM stdin;
1	2	0	\N	3	0	5.604393899440765	24	24	\N	\N	5	1795920290	\N	\N	-1686965748
2	2	3	\N	3	0	5.584552367528279	24	24	\N	\N	5	1795920290	\N	\N	-1013215228
3	2	1	1	3	0	5.599720140298207	24	24	0.23555434949137832	0.15778253480541513	5	1795920290	\N	\N	1515444804
4	2	5	1	3	0	5.588072220484416	24	24	0.822601754155804	1.0418546133122748	5	1795920290	\N	\N	-1423530691
\.


--
-- Data for Name: extras; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.extras (adapter_id, file, blob_id, size, crc) FROM stdin;
\.


--
-- Data for Name: generators; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.generators (id, base_model_id, version, parent_id, blob_id, config, metrics, is_current, created_at, start_id, crc) FROM stdin;
1	1	1	\N	1	\\x78daad91c15284300c86df25670641d73df02a8ed3c9d2ec52296d6dc332c8f0eea6b0e37a512fdef227cdf7ff6d1738612235784d161a60e3e6076b714028a0f54e1b36de4173f8a654321f04cdd36301349c486be32ed0d4c7027ae37482e66501e3c2c8521e65d18fbc8bbc119099a21061b32c2dce1453b9ace56043a9fde45488fe0dd6e20ec97b5f90ecf33324913d2b99bab2ff83f37b983be7fd9ff25c6f9cd7022c3239de1e753f098d10534fdc767b697d46cb9cbda588ae95f7aecaba96464423460b9c8d43ab5287719b3d0b8b303af90b15859f7b55258444a44548c114725ee1f398c30aed6a68523afa20d7b951268cc318363b11642e1d2b4d2dce1bb15ea569344bcec3fa098892c056	\\x78da458e4b0e02211044efd25b09612030c26508421bc9c827c0688cf1ee326edcbeaa97aa375ce2e8b662b3d53597706003c3a9e4926926245f95d667bd1208f8881ec180af3b10c0ec4b40dbd1971c3a18461721095ce3f8b385323559cc714477b7ce6eb93cf3ec12a8e8369b3095f602a3d4ba30c1059fbc158fbde3611368d8f784c15e5b493fad0fac47349ba3347f9b77f81ca6ec74bcfa7c015c6a4071	t	1795920288	\N	-1394072214
\.


--
-- Data for Name: place; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.place (number, blobs, changes, crc) FROM stdin;
18902e30887f4929a02e7483fa78276d	/work/trees/goldenfleet/blobs	4	1624166159
\.


--
-- Data for Name: run_codes; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.run_codes (run_id, adapter_id, blob_id, generator, squared_error, initial_is_known, crc) FROM stdin;
\.


--
-- Data for Name: task_vectors; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.task_vectors (task_id, view, support_set, extractor_id, id, blob_id, dim, crc) FROM stdin;
1	0	0	2	1	9	32	1758452489
1	0	1	2	2	9	32	-390513628
1	1	0	3	3	9	32	852363521
1	1	1	3	4	9	32	-279658720
2	0	0	2	5	13	32	-1211087024
2	0	1	2	6	13	32	-225481278
2	1	0	3	7	13	32	-1185821008
2	1	1	3	8	13	32	-432929620
3	0	0	7	9	17	32	1014641179
3	0	1	7	10	17	32	-372097471
\.


--
-- Data for Name: tasks; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.tasks (id, name, base_model_id, samples_id, eval_id, created_at, pinned, folder, note, tags, label_id, crc) FROM stdin;
1	poems	1	2	3	1795920286	f	/work/trees/goldenfleet/loras/poems	\N	\N	\N	1930684134
2	rules	1	2	3	1795920286	f	/work/trees/goldenfleet/loras/rules	kept for later versions	golden	\N	1730373598
3	silent	1	\N	\N	1795920286	t	/work/trees/goldenfleet/loras/silent	\N	\N	\N	-1596200985
\.


--
-- Data for Name: train_runs; Type: TABLE DATA; Schema: public; Owner: -
--

COPY public.train_runs (id, base_model_id, state, config, step, weights_id, optimizer_id, created_at, updated_at, crc) FROM stdin;
\.


--
-- Name: adapters_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.adapters_id_seq', 5, true);


--
-- Name: base_labels_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.base_labels_id_seq', 1, false);


--
-- Name: base_models_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.base_models_id_seq', 1, true);


--
-- Name: blobs_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.blobs_id_seq', 19, true);


--
-- Name: codes_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.codes_id_seq', 3, true);


--
-- Name: documents_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.documents_id_seq', 7, true);


--
-- Name: evaluations_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.evaluations_id_seq', 4, true);


--
-- Name: generators_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.generators_id_seq', 1, true);


--
-- Name: tasks_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.tasks_id_seq', 3, true);


--
-- Name: train_runs_id_seq; Type: SEQUENCE SET; Schema: public; Owner: -
--

SELECT pg_catalog.setval('public.train_runs_id_seq', 1, false);


--
-- Name: adapters adapters_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_pkey PRIMARY KEY (id);


--
-- Name: alembic_version alembic_version_pkc; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);


--
-- Name: base_labels base_labels_label_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_labels
    ADD CONSTRAINT base_labels_label_key UNIQUE (label);


--
-- Name: base_labels base_labels_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_labels
    ADD CONSTRAINT base_labels_pkey PRIMARY KEY (id);


--
-- Name: base_models base_models_name_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_models
    ADD CONSTRAINT base_models_name_key UNIQUE (name);


--
-- Name: base_models base_models_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_models
    ADD CONSTRAINT base_models_pkey PRIMARY KEY (id);


--
-- Name: blobs blobs_digest_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT blobs_digest_key UNIQUE (digest);


--
-- Name: blobs blobs_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.blobs
    ADD CONSTRAINT blobs_pkey PRIMARY KEY (id);


--
-- Name: codes codes_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_pkey PRIMARY KEY (id);


--
-- Name: codes codes_task_id_generator_id_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_task_id_generator_id_key UNIQUE (task_id, generator_id);


--
-- Name: documents documents_digest_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.documents
    ADD CONSTRAINT documents_digest_key UNIQUE (digest);


--
-- Name: documents documents_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.documents
    ADD CONSTRAINT documents_pkey PRIMARY KEY (id);


--
-- Name: evaluations evaluations_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations
    ADD CONSTRAINT evaluations_pkey PRIMARY KEY (id);


--
-- Name: extras extras_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.extras
    ADD CONSTRAINT extras_pkey PRIMARY KEY (adapter_id, file, blob_id);


--
-- Name: generators generators_base_model_id_version_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_base_model_id_version_key UNIQUE (base_model_id, version);


--
-- Name: generators generators_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_pkey PRIMARY KEY (id);


--
-- Name: place place_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.place
    ADD CONSTRAINT place_pkey PRIMARY KEY (number);


--
-- Name: run_codes run_codes_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run_codes
    ADD CONSTRAINT run_codes_pkey PRIMARY KEY (run_id, adapter_id);


--
-- Name: task_vectors task_vectors_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.task_vectors
    ADD CONSTRAINT task_vectors_pkey PRIMARY KEY (task_id, view, support_set, extractor_id);


--
-- Name: tasks tasks_name_key; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_name_key UNIQUE (name);


--
-- Name: tasks tasks_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_pkey PRIMARY KEY (id);


--
-- Name: train_runs train_runs_pkey; Type: CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.train_runs
    ADD CONSTRAINT train_runs_pkey PRIMARY KEY (id);


--
-- Name: icm_new_adapters; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_adapters ON public.adapters USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_base_labels; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_base_labels ON public.base_labels USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_base_models; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_base_models ON public.base_models USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_blobs; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_blobs ON public.blobs USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_codes; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_codes ON public.codes USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_documents; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_documents ON public.documents USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_evaluations; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_evaluations ON public.evaluations USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_extras; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_extras ON public.extras USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_generators; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_generators ON public.generators USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_run_codes; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_run_codes ON public.run_codes USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_task_vectors; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_task_vectors ON public.task_vectors USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_tasks; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_tasks ON public.tasks USING btree (crc) WHERE (crc IS NULL);


--
-- Name: icm_new_train_runs; Type: INDEX; Schema: public; Owner: -
--

CREATE INDEX icm_new_train_runs ON public.train_runs USING btree (crc) WHERE (crc IS NULL);


--
-- Name: one_current_generator; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_current_generator ON public.generators USING btree (base_model_id) WHERE is_current;


--
-- Name: one_final_adapter; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_final_adapter ON public.adapters USING btree (task_id) WHERE is_final;


--
-- Name: one_row_per_adapter; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_row_per_adapter ON public.adapters USING btree (task_id, weights_id, config_id, COALESCE(step, ('-1'::integer)::bigint));


--
-- Name: one_row_per_evaluation; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_row_per_evaluation ON public.evaluations USING btree (task_id, rung, COALESCE(generator_id, ('-1'::integer)::bigint), data_id, metric, COALESCE(load_in, '-1'::integer));


--
-- Name: one_running_train_run; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_running_train_run ON public.train_runs USING btree (base_model_id) WHERE ((state)::text = 'running'::text);


--
-- Name: one_task_per_name; Type: INDEX; Schema: public; Owner: -
--

CREATE UNIQUE INDEX one_task_per_name ON public.tasks USING btree (lower((name)::text));


--
-- Name: extras icm_count; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_count AFTER INSERT OR DELETE ON public.extras FOR EACH ROW EXECUTE FUNCTION public.icm_count_extras();


--
-- Name: adapters icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.adapters FOR EACH ROW EXECUTE FUNCTION public.icm_write_adapters();


--
-- Name: base_labels icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.base_labels FOR EACH ROW EXECUTE FUNCTION public.icm_write_base_labels();


--
-- Name: base_models icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.base_models FOR EACH ROW EXECUTE FUNCTION public.icm_write_base_models();


--
-- Name: blobs icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.blobs FOR EACH ROW EXECUTE FUNCTION public.icm_write_blobs();


--
-- Name: codes icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.codes FOR EACH ROW EXECUTE FUNCTION public.icm_write_codes();


--
-- Name: documents icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.documents FOR EACH ROW EXECUTE FUNCTION public.icm_write_documents();


--
-- Name: evaluations icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.evaluations FOR EACH ROW EXECUTE FUNCTION public.icm_write_evaluations();


--
-- Name: extras icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.extras FOR EACH ROW EXECUTE FUNCTION public.icm_write_extras();


--
-- Name: generators icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.generators FOR EACH ROW EXECUTE FUNCTION public.icm_write_generators();


--
-- Name: run_codes icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.run_codes FOR EACH ROW EXECUTE FUNCTION public.icm_write_run_codes();


--
-- Name: task_vectors icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.task_vectors FOR EACH ROW EXECUTE FUNCTION public.icm_write_task_vectors();


--
-- Name: tasks icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.tasks FOR EACH ROW EXECUTE FUNCTION public.icm_write_tasks();


--
-- Name: train_runs icm_write; Type: TRIGGER; Schema: public; Owner: -
--

CREATE TRIGGER icm_write BEFORE INSERT OR DELETE OR UPDATE ON public.train_runs FOR EACH ROW EXECUTE FUNCTION public.icm_write_train_runs();


--
-- Name: adapters adapters_card_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_card_id_fkey FOREIGN KEY (card_id) REFERENCES public.blobs(id);


--
-- Name: adapters adapters_config_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_config_id_fkey FOREIGN KEY (config_id) REFERENCES public.blobs(id);


--
-- Name: adapters adapters_description_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_description_id_fkey FOREIGN KEY (description_id) REFERENCES public.documents(id);


--
-- Name: adapters adapters_initial_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_initial_id_fkey FOREIGN KEY (initial_id) REFERENCES public.blobs(id);


--
-- Name: adapters adapters_task_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_task_id_fkey FOREIGN KEY (task_id) REFERENCES public.tasks(id) ON DELETE CASCADE;


--
-- Name: adapters adapters_weights_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.adapters
    ADD CONSTRAINT adapters_weights_id_fkey FOREIGN KEY (weights_id) REFERENCES public.blobs(id);


--
-- Name: base_labels base_labels_base_model_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.base_labels
    ADD CONSTRAINT base_labels_base_model_id_fkey FOREIGN KEY (base_model_id) REFERENCES public.base_models(id);


--
-- Name: codes codes_adapter_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_adapter_id_fkey FOREIGN KEY (adapter_id) REFERENCES public.adapters(id) ON DELETE CASCADE;


--
-- Name: codes codes_blob_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_blob_id_fkey FOREIGN KEY (blob_id) REFERENCES public.blobs(id);


--
-- Name: codes codes_generator_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_generator_id_fkey FOREIGN KEY (generator_id) REFERENCES public.generators(id) ON DELETE CASCADE;


--
-- Name: codes codes_residual_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_residual_id_fkey FOREIGN KEY (residual_id) REFERENCES public.blobs(id);


--
-- Name: codes codes_task_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.codes
    ADD CONSTRAINT codes_task_id_fkey FOREIGN KEY (task_id) REFERENCES public.tasks(id) ON DELETE CASCADE;


--
-- Name: evaluations evaluations_data_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations
    ADD CONSTRAINT evaluations_data_id_fkey FOREIGN KEY (data_id) REFERENCES public.blobs(id);


--
-- Name: evaluations evaluations_generator_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations
    ADD CONSTRAINT evaluations_generator_id_fkey FOREIGN KEY (generator_id) REFERENCES public.generators(id) ON DELETE CASCADE;


--
-- Name: evaluations evaluations_settings_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations
    ADD CONSTRAINT evaluations_settings_id_fkey FOREIGN KEY (settings_id) REFERENCES public.documents(id);


--
-- Name: evaluations evaluations_task_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.evaluations
    ADD CONSTRAINT evaluations_task_id_fkey FOREIGN KEY (task_id) REFERENCES public.tasks(id) ON DELETE CASCADE;


--
-- Name: extras extras_adapter_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.extras
    ADD CONSTRAINT extras_adapter_id_fkey FOREIGN KEY (adapter_id) REFERENCES public.adapters(id) ON DELETE CASCADE;


--
-- Name: extras extras_blob_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.extras
    ADD CONSTRAINT extras_blob_id_fkey FOREIGN KEY (blob_id) REFERENCES public.blobs(id);


--
-- Name: generators generators_base_model_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_base_model_id_fkey FOREIGN KEY (base_model_id) REFERENCES public.base_models(id);


--
-- Name: generators generators_blob_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_blob_id_fkey FOREIGN KEY (blob_id) REFERENCES public.blobs(id);


--
-- Name: generators generators_parent_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_parent_id_fkey FOREIGN KEY (parent_id) REFERENCES public.generators(id) ON DELETE SET NULL;


--
-- Name: generators generators_start_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.generators
    ADD CONSTRAINT generators_start_id_fkey FOREIGN KEY (start_id) REFERENCES public.blobs(id);


--
-- Name: run_codes run_codes_adapter_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run_codes
    ADD CONSTRAINT run_codes_adapter_id_fkey FOREIGN KEY (adapter_id) REFERENCES public.adapters(id) ON DELETE CASCADE;


--
-- Name: run_codes run_codes_blob_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run_codes
    ADD CONSTRAINT run_codes_blob_id_fkey FOREIGN KEY (blob_id) REFERENCES public.blobs(id);


--
-- Name: run_codes run_codes_run_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.run_codes
    ADD CONSTRAINT run_codes_run_id_fkey FOREIGN KEY (run_id) REFERENCES public.train_runs(id) ON DELETE CASCADE;


--
-- Name: task_vectors task_vectors_blob_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.task_vectors
    ADD CONSTRAINT task_vectors_blob_id_fkey FOREIGN KEY (blob_id) REFERENCES public.blobs(id);


--
-- Name: task_vectors task_vectors_extractor_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.task_vectors
    ADD CONSTRAINT task_vectors_extractor_id_fkey FOREIGN KEY (extractor_id) REFERENCES public.documents(id);


--
-- Name: task_vectors task_vectors_task_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.task_vectors
    ADD CONSTRAINT task_vectors_task_id_fkey FOREIGN KEY (task_id) REFERENCES public.tasks(id) ON DELETE CASCADE;


--
-- Name: tasks tasks_base_model_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_base_model_id_fkey FOREIGN KEY (base_model_id) REFERENCES public.base_models(id);


--
-- Name: tasks tasks_eval_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_eval_id_fkey FOREIGN KEY (eval_id) REFERENCES public.blobs(id);


--
-- Name: tasks tasks_label_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_label_id_fkey FOREIGN KEY (label_id) REFERENCES public.base_labels(id);


--
-- Name: tasks tasks_samples_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.tasks
    ADD CONSTRAINT tasks_samples_id_fkey FOREIGN KEY (samples_id) REFERENCES public.blobs(id);


--
-- Name: train_runs train_runs_base_model_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.train_runs
    ADD CONSTRAINT train_runs_base_model_id_fkey FOREIGN KEY (base_model_id) REFERENCES public.base_models(id);


--
-- Name: train_runs train_runs_optimizer_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.train_runs
    ADD CONSTRAINT train_runs_optimizer_id_fkey FOREIGN KEY (optimizer_id) REFERENCES public.blobs(id);


--
-- Name: train_runs train_runs_weights_id_fkey; Type: FK CONSTRAINT; Schema: public; Owner: -
--

ALTER TABLE ONLY public.train_runs
    ADD CONSTRAINT train_runs_weights_id_fkey FOREIGN KEY (weights_id) REFERENCES public.blobs(id);


--
-- PostgreSQL database dump complete
--

\unrestrict 5pEduY7fb7gb5h10vGW6hox7JvFqQ5ZL7M9iB3PdCPDu4zpQLw8TL5xmeHVC4aY

