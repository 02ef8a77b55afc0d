PRAGMA user_version = 1;
BEGIN TRANSACTION;
CREATE TABLE client (name TEXT PRIMARY KEY, entry TEXT NOT NULL);
INSERT INTO "client" VALUES('siem','{"client":{"name":"siem","generation":1,"address":"192.0.2.9","port":514,"streams":["a","b"],"source":"original","prefixes":["10.0.0.0/8"],"sample":10,"group":"g","hop_limit":3,"dscp":46},"origin":"json","address":"192.0.2.7","port":4000,"ttl":5.0,"held":true,"holder":"holder"}');
INSERT INTO "client" VALUES('n','{"client":{"name":"n","generation":2,"address":"192.0.2.8","port":4001},"origin":"names","address":"192.0.2.7","port":4000,"ttl":0.0,"held":false,"holder":"holder"}');
CREATE TABLE state (revision INTEGER NOT NULL, generation INTEGER NOT NULL, boot_id TEXT NOT NULL);
INSERT INTO "state" VALUES(2,2,'00000000-0000-0000-0000-000000000001');
COMMIT;
