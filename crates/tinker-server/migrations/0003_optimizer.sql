-- The optimizer that a training run was created with, as JSON; NULL is AdamW.
ALTER TABLE training_runs ADD COLUMN optimizer TEXT;
