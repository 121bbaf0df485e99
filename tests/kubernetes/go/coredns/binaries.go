//go:build binaries

// Package coredns names the server that the tests run, so that its modules stay in go.mod.
package coredns

import _ "github.com/coredns/coredns"
