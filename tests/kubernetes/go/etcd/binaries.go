//go:build binaries

// Package etcd names the server that the tests run, so that its modules stay in go.mod.
package etcd

import _ "go.etcd.io/etcd/server/v3"
