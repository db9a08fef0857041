-- Who may do what with a team's store. Run it once, as an administrator, connected to the empty database:
--     psql -v ON_ERROR_STOP=1 -d fleet -f roles.sql
-- `icm_owner` makes the tables with `icm init`, and changes them when a later icm needs that. Give each person and
-- each machine a login of its own: CREATE ROLE ana LOGIN PASSWORD '...' IN ROLE icm_writer;

CREATE ROLE icm_owner LOGIN;
CREATE ROLE icm_writer;
CREATE ROLE icm_reader;

DO $$ BEGIN
    EXECUTE format('REVOKE ALL ON DATABASE %I FROM PUBLIC', current_database());
    EXECUTE format('GRANT CONNECT ON DATABASE %I TO icm_reader', current_database());
    -- TEMPORARY: a transaction that writes notes in a temporary table which rows it changed.
    EXECUTE format('GRANT CONNECT, TEMPORARY ON DATABASE %I TO icm_owner, icm_writer', current_database());
END $$;

GRANT USAGE, CREATE ON SCHEMA public TO icm_owner;
GRANT USAGE ON SCHEMA public TO icm_writer, icm_reader;

-- Of all tables that the owner will make.
ALTER DEFAULT PRIVILEGES FOR ROLE icm_owner IN SCHEMA public GRANT SELECT ON TABLES TO icm_writer, icm_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE icm_owner IN SCHEMA public GRANT INSERT, UPDATE, DELETE ON TABLES TO icm_writer;
ALTER DEFAULT PRIVILEGES FOR ROLE icm_owner IN SCHEMA public GRANT USAGE ON SEQUENCES TO icm_writer;
