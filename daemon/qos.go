package daemon

import (
	"fmt"

	"forerun/api"
)

// QoS reads --qos: api.QoSReady or api.QoSLess, which is also what nothing means.
func QoS(mode string) (string, error) {
	switch mode {
	case "":
		return api.QoSLess, nil
	case api.QoSReady, api.QoSLess:
		return mode, nil
	}
	return "", fmt.Errorf("--qos %q is not known: ready or less", mode)
}
