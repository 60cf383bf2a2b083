-- The name of the key that made a session, and so has what belongs to it; NULL is the data directory's
-- own key.
ALTER TABLE sessions ADD COLUMN owner TEXT;
