-- Whether a sampler follows the weights that its training run saves for it.
ALTER TABLE samplers ADD COLUMN inflight INTEGER NOT NULL DEFAULT 0;
