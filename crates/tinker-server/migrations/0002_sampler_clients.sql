-- How many clients share a sampler; each numbers its samples apart from the others'.
ALTER TABLE samplers ADD COLUMN n_clients INTEGER NOT NULL DEFAULT 1;
